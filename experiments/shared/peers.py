"""The methods that are compared: how to make each, and what to tune in it."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

from experiments.shared.labels import ForgetLoss
from experiments.shared.methods.eupmu import eupmu, eupmu_budget
from experiments.shared.methods.exact_surgery import exact_surgery
from experiments.shared.methods.famo import famo
from experiments.shared.methods.fine_tuning import fine_tuning
from experiments.shared.methods.gdr_gma import gdr_gma
from experiments.shared.methods.gradient_ascent import gradient_ascent
from experiments.shared.methods.l1_sparse import l1_sparse
from experiments.shared.methods.method import Method
from experiments.shared.methods.neggrad_plus import neggrad_plus
from experiments.shared.methods.ngdiff import ngdiff
from experiments.shared.methods.pcgrad import pcgrad
from experiments.shared.methods.pdu import pdu
from experiments.shared.methods.salun import salun
from experiments.shared.methods.scalarisation import scalarisation
from experiments.shared.methods.scrub import scrub
from experiments.shared.methods.torchjd import pcd, upgrad
from experiments.shared.models.classifier import output_bias

Range = tuple[float, float]
Family = Literal["EUPMU", "other"]


class Peer(NamedTuple):
    """One method among those that are compared.

    Attributes:
      make: (losses, optimizer, **knobs) -> Method.
      learning_rate: its range [low, high], searched in the logarithm.
      knobs: the ranges of what else is tuned, likewise.
      forget_loss: what it minimises in order to forget, if it minimises anything.
      is_told_baseline: it has the knob `baseline`, too: the mean training loss of the retain set before
        the first step.
      family: EUPMU stands out in pictures.
      constant: the peer that descends the same losses under a constant weight, for one whose multiplier
        settles: there it is compared with that weight.
      package: what it needs of the extra "benchmarks".
    """

    make: Callable[..., Method]
    learning_rate: Range = (1e-3, 1e-1)
    knobs: Mapping[str, Range] = MappingProxyType({})
    forget_loss: ForgetLoss = "wrong labels"
    is_told_baseline: bool = False
    family: Family = "other"
    constant: str | None = None
    package: str | None = None


def eupmu_peer(
    learning_rate: Range,
    demand: Range,
    constant: str = "random labels",
    forget_loss: ForgetLoss = "wrong labels",
    **settings: str | bool,
) -> Peer:
    return Peer(
        partial(eupmu, **settings),
        learning_rate,
        {"demand": demand},
        forget_loss,
        family="EUPMU",
        constant=constant,
    )


def budget_peer(forget_loss: ForgetLoss) -> Peer:
    """The budget is in nats: what the retain loss may have risen by at the end."""
    return Peer(
        eupmu_budget,
        knobs={"budget": (3e-3, 0.3)},
        forget_loss=forget_loss,
        is_told_baseline=True,
        family="EUPMU",
    )


PEERS: dict[str, Peer] = {
    "fine-tuning": Peer(fine_tuning),
    "gradient ascent": Peer(gradient_ascent, (1e-6, 3e-5)),
    "NegGrad+": Peer(neggrad_plus, knobs={"ascent": (1e-3, 0.3)}),
    "random labels": Peer(scalarisation, knobs={"weight": (0.5, 50)}),
    "random labels (log)": Peer(partial(scalarisation, log_losses=True), knobs={"weight": (0.05, 5)}),
    "random labels (ramp)": Peer(partial(scalarisation, ramped=True), knobs={"weight": (0.5, 50)}),
    "SalUn": Peer(salun, knobs={"weight": (0.5, 50)}),
    "l1-sparse": Peer(l1_sparse, knobs={"penalty": (1e-5, 1e-2)}),
    "SCRUB": Peer(scrub, (3e-4, 3e-2), {"ascent_share": (0.1, 1.0)}),
    "FAMO": Peer(famo, knobs={"weight_rate": (1e-3, 0.3)}),
    "GDR-GMA": Peer(partial(gdr_gma, output_bias=output_bias), (1e-5, 1e-2), {"target": (0.02, 0.5)}),
    "PCGrad": Peer(pcgrad, (3e-4, 3e-2)),
    "exact surgery": Peer(exact_surgery, (3e-4, 3e-2), {"demand": (0.1, 10)}),
    "PDU": Peer(pdu, (3e-4, 3e-2), {"bound": (1e-2, 0.5), "dual_rate": (1e-2, 1)}),
    "NGDiff": Peer(ngdiff, (1e-5, 1e-2)),
    "TorchJD UPGrad": Peer(upgrad, (3e-4, 3e-2), {"weight": (0.5, 50)}, package="torchjd"),
    "TorchJD PCD": Peer(pcd, (3e-4, 3e-2), {"tau": (3e-2, 1)}, package="torchjd"),
    "EUPMU lookahead": eupmu_peer((1e-3, 1e-1), (3e-3, 0.3), measure="lookahead"),
    "EUPMU lagged": eupmu_peer((1e-3, 1e-1), (3e-3, 0.3), measure="lagged"),
    "EUPMU directional": eupmu_peer((1e-3, 1e-1), (0.1, 10), measure="directional"),
    "EUPMU lookahead (log)": eupmu_peer(
        (3e-4, 3e-2), (1e-3, 0.1), "random labels (log)", measure="lookahead", log_losses=True
    ),
    "EUPMU budget": budget_peer("wrong labels"),
    "unseen confidence": Peer(scalarisation, knobs={"weight": (0.5, 50)}, forget_loss="unseen confidence"),
    "EUPMU lagged (unseen)": eupmu_peer(
        (1e-3, 1e-1), (3e-3, 0.3), "unseen confidence", "unseen confidence", measure="lagged"
    ),
    "EUPMU budget (unseen)": budget_peer("unseen confidence"),
}
"""By display name, in the order of tables and plots."""
