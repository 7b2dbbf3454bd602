"""The methods that are compared: how to make each, and what to tune in it."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from experiments.shared.methods.eupmu import eupmu
from experiments.shared.methods.exact_surgery import exact_surgery
from experiments.shared.methods.famo import random_label_famo
from experiments.shared.methods.fine_tuning import fine_tuning
from experiments.shared.methods.gdr_gma import gdr_gma
from experiments.shared.methods.gradient_ascent import gradient_ascent
from experiments.shared.methods.l1_sparse import l1_sparse
from experiments.shared.methods.method import Batch, Method
from experiments.shared.methods.neggrad_plus import neggrad_plus
from experiments.shared.methods.ngdiff import ngdiff
from experiments.shared.methods.pcgrad import pcgrad
from experiments.shared.methods.pdu import pdu
from experiments.shared.methods.random_labels import random_labels
from experiments.shared.methods.salun import salun
from experiments.shared.methods.scrub import scrub

__all__ = ["PEERS", "Batch", "Method", "Peer"]

Range = tuple[float, float]


class Peer(NamedTuple):
    """make(apply, optimizer, **knobs) -> Method, and the range [low, high] of each knob's logarithm.

    Every peer has a learning rate; `knobs` are the others.
    """

    make: Callable[..., Method]
    learning_rate: Range = (1e-3, 1e-1)
    knobs: Mapping[str, Range] = MappingProxyType({})


PEERS: dict[str, Peer] = {
    "fine-tuning": Peer(fine_tuning),
    "gradient ascent": Peer(gradient_ascent, (1e-6, 3e-5)),
    "NegGrad+": Peer(neggrad_plus, knobs={"ascent": (1e-3, 0.3)}),
    "random labels": Peer(random_labels, knobs={"weight": (0.5, 50)}),
    "random labels (log)": Peer(partial(random_labels, log_losses=True), knobs={"weight": (0.05, 5)}),
    "random labels (ramp)": Peer(partial(random_labels, ramped=True), knobs={"weight": (0.5, 50)}),
    "SalUn": Peer(salun, knobs={"weight": (0.5, 50)}),
    "l1-sparse": Peer(l1_sparse, knobs={"penalty": (1e-5, 1e-2)}),
    "SCRUB": Peer(scrub, (3e-4, 3e-2), {"ascent_share": (0.1, 1.0)}),
    "FAMO": Peer(random_label_famo, knobs={"weight_rate": (1e-3, 0.3)}),
    "GDR-GMA": Peer(gdr_gma, (1e-5, 1e-2), {"target": (0.02, 0.5)}),
    "PCGrad": Peer(pcgrad, (3e-4, 3e-2)),
    "exact surgery": Peer(exact_surgery, (3e-4, 3e-2), {"demand": (0.1, 10)}),
    "PDU": Peer(pdu, (3e-4, 3e-2), {"bound": (1e-2, 0.5), "dual_rate": (1e-2, 1)}),
    "NGDiff": Peer(ngdiff, (1e-5, 1e-2)),
    "EUPMU lookahead": Peer(eupmu, knobs={"demand": (3e-3, 0.3)}),
    "EUPMU lagged": Peer(partial(eupmu, measure="lagged"), knobs={"demand": (3e-3, 0.3)}),
    "EUPMU directional": Peer(partial(eupmu, measure="directional"), knobs={"demand": (0.1, 10)}),
    "EUPMU lookahead (log)": Peer(partial(eupmu, log_losses=True), (3e-4, 3e-2), {"demand": (1e-3, 0.1)}),
}
"""By display name, in the order of tables and plots."""
