"""Convolutions as matrix products are convolutions."""

import jax
import numpy as np
import pytest
from jax.lax import conv_general_dilated

from experiments.shared.models.convolution import convolution


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 2))])
@pytest.mark.parametrize("size", [(7, 8), (3, 3)])
def test_values_and_gradients(strides, padding, size):
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, *size, 3)), rng.normal(size=(3, 2, 3, 5))
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def of(function):
        def total(images, kernel):
            out = function(images, kernel, strides, padding, **layout)
            return (out**2).sum(), out

        return jax.value_and_grad(total, (0, 1), has_aux=True)

    with jax.enable_x64(True):
        got, wanted = of(convolution)(images, kernel), of(conv_general_dilated)(images, kernel)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, wanted)
