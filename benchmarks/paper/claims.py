"""What the paper claims, and when a claim counts as held.

Thresholds are ours wherever the paper gives no number; they stand in the criterion, so that a
reader can judge them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.paper import checks
from benchmarks.paper.checks import COMPARED, FITTED, SEVERAL_HUNDRED, UNFITTED, Answer
from benchmarks.paper.reading import SMOOTH, NotRun, Summaries, data_of, distinct, number
from benchmarks.paper.registry import CIFAR10, FIGURES, MNIST
from benchmarks.paper.settings import ANODE, NODE, RESNET

HELD, NOT_HELD, NOT_RUN = "held", "not held", "not run"
TOY, IMAGES, SOLVER = "toy", "images", "solver"
DIMS = (1, 2)


@dataclass(frozen=True)
class Finding:
    """What our runs say to a claim.

    Attributes:
        verdict: "held", "not held" or "not run".
        measured: The numbers, or why there are none.
        data: What the figures' runs were trained on, in words.
        machine: What they ran on.
        scale: Of the figures: "smoke", "reduced", "full", or several.
        synthetic: Whether synthetic data are among them.
    """

    verdict: str
    measured: str
    data: str = ""
    machine: str = ""
    scale: str = ""
    synthetic: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or of ours about the solver.

    Attributes:
        id: Short, for links.
        kind: "toy", "images" or "solver".
        title: In a few words.
        paper: What the paper says, in our words.
        criterion: When it counts as held.
        figures: Whose runs it is judged by; none if it is computed without any.
        check: Answers whether it held, and with which numbers.
        panels: Of the figures, the panels that it is about; none if it is about all.
    """

    id: str
    kind: str
    title: str
    paper: str
    criterion: str
    figures: tuple[str, ...]
    check: Callable[[Summaries], Answer]
    panels: tuple[str, ...] = ()

    def judge(self, summaries: Summaries) -> Finding:
        """What the summaries say to it."""
        try:
            held, measured = self.check(summaries)
        except NotRun as reason:
            return Finding(NOT_RUN, f"{reason}.")
        verdict = HELD if held else NOT_HELD
        used = [summaries[figure] for figure in self.figures if figure in summaries]
        if not used:
            return Finding(verdict, measured, "no data: computed", "any machine")
        trained_on = [data_of(one, self.panels) for one in used]
        return Finding(
            verdict,
            measured,
            "; ".join(distinct(name for names, _ in trained_on for name in names)),
            "; ".join(distinct(name for one in used for name in one["machines"])),
            ", ".join(distinct(one["scale"] for one in used)),
            any(synthetic for _, synthetic in trained_on),
        )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "flow-identity",
        TOY,
        "A flow learns the identity",
        "The flow of an ODE easily learns the identity in one dimension (section 3, figure 3).",
        f"Mean final loss of the NODE at most {FITTED}.",
        ("3",),
        partial(checks.flow, panel="identity", label=NODE, high=FITTED),
        ("identity",),
    ),
    Claim(
        "flow-crossing",
        TOY,
        "A flow cannot swap 1 and -1",
        "Trajectories cannot cross, so the flow cannot represent g_1d and maps every point to 0 "
        "(proposition 1, figure 3). The loss of that is 1.",
        "Mean final loss of the NODE between 0.9 and 1.1.",
        ("3",),
        partial(checks.flow, panel="g_1d", label=NODE, low=0.9, high=1.1),
        ("g_1d",),
    ),
    Claim(
        "resnet-crossing",
        TOY,
        "A ResNet can",
        "A ResNet makes discrete jumps, so its trajectories can cross and it represents g_1d "
        "(section 3, figure 3).",
        f"Mean final loss of the ResNet at most {FITTED}.",
        ("3",),
        partial(checks.flow, panel="g_1d", label=RESNET, high=FITTED),
        ("g_1d",),
    ),
    Claim(
        "node-cannot-1d",
        TOY,
        "NODE cannot fit g(x) in d = 1",
        "In d = 1 the ResNet easily fits g(x), the NODE cannot approximate it (figure 5).",
        f"Mean final loss of the ResNet at most {FITTED}, of the NODE at least {UNFITTED}. No "
        "monotone function of x, which is all it can learn, has a loss far below 2/3.",
        ("5",),
        checks.node_cannot,
        (checks.g_in(1),),
    ),
    Claim(
        "node-struggles-2d",
        TOY,
        "NODE struggles with g(x) in d = 2",
        "In d = 2 the NODE approximates g(x) in the end, but struggles compared to the ResNet "
        "(figure 5).",
        f"The mean loss of the NODE gets to {COMPARED}, in at least 1.5 times the ResNet's epochs.",
        ("5",),
        checks.node_struggles,
        (checks.g_in(2),),
    ),
    *(
        Claim(
            f"separable-{dim}d",
            TOY,
            f"Separable data are easier, d = {dim}",
            "The NODE has less trouble with data that can be separated without tearing the space "
            "apart (figure 5).",
            f"More of the NODE's runs end at a loss of at most {COMPARED} than on g(x), or as many "
            "and the mean loss gets there in fewer epochs.",
            ("5",),
            partial(checks.separable, dim=dim),
            (checks.g_in(dim), f"separable, d = {dim}"),
        )
        for dim in DIMS
    ),
    *(
        Claim(
            f"node-nfe-{dim}d",
            TOY,
            f"NODE's NFE grows, d = {dim}",
            "As training goes on, the NODE needs more and more function evaluations (figure 7).",
            "NFE of the last epoch over that of the first at least 1.25, on average.",
            ("7",),
            partial(checks.nfe_grows, dim=dim),
            (checks.g_in(dim),),
        )
        for dim in DIMS
    ),
    *(
        Claim(
            f"anode-fits-{dim}d",
            TOY,
            f"ANODE fits g(x), d = {dim}",
            "ANODEs fit the functions that NODEs cannot (figure 8).",
            f"Mean final loss of the ANODE at most {FITTED}, and below the NODE's.",
            ("8",),
            partial(checks.anode_fits, dim=dim),
            (checks.g_in(dim),),
        )
        for dim in DIMS
    ),
    *(
        Claim(
            f"anode-faster-{dim}d",
            TOY,
            f"ANODE learns g(x) faster, d = {dim}",
            "ANODEs learn much faster than NODEs, though their input is wider (figure 8).",
            f"The mean loss of the ANODE gets to {COMPARED} in at most half of the NODE's epochs.",
            ("8",),
            partial(checks.anode_faster, dim=dim),
            (checks.g_in(dim),),
        )
        for dim in DIMS
    ),
    *(
        Claim(
            f"anode-nfe-{dim}d",
            TOY,
            f"ANODE's NFE hardly grows, d = {dim}",
            "While training on g(x), the NFE of the ANODE hardly increases; that of the NODE "
            "nearly doubles (figure 11).",
            "NFE of the last epoch over that of the first, on average: NODE at least 1.5, ANODE at "
            "most 1.25.",
            ("11",),
            partial(checks.nfe_flat, dim=dim),
            (checks.g_in(dim),),
        )
        for dim in DIMS
    ),
    Claim(
        "slices",
        TOY,
        "ANODE generalises to removed slices",
        "On slices of the plane that were held out, the validation loss of the ANODE is nearly 0; "
        "the NODE has a large generalisation gap (figure 12).",
        "Mean final validation loss of the ANODE at most 0.1, of the NODE at least 3 times that.",
        ("12",),
        checks.slices,
        ("slices",),
    ),
    *(
        Claim(
            f"search-{model.lower()}-{dim}d",
            TOY,
            f"Best parameters of the {model}, d = {dim}",
            "The search finds batches of 64, a learning rate of 1e-3 and a hidden dimension of 32 "
            f"best{extra} (appendix E).",
            "Of all settings the paper's has the lowest mean validation loss, or is within one "
            "standard deviation (of the best one's folds) of it.",
            ("search",),
            partial(checks.search, model=model, dim=dim),
            (f"{model}, d = {dim}",),
        )
        for model, extra in (
            (NODE, ""),
            (ANODE, ", with 5 augmented dimensions"),
            (RESNET, ", with 5 layers"),
        )
        for dim in DIMS
    ),
    Claim(
        "parameters",
        IMAGES,
        "Parameter counts",
        "Equal numbers of parameters: MNIST 84,395 (NODE, 92 filters) and 84,816 (ANODE, 64 "
        "filters, p = 5); CIFAR10 172,358 (NODE, 125) and 171,799 (ANODE, 64, p = 10) "
        "(appendix E).",
        "Exactly these counts, of fields that do not see the time: with it they have more.",
        (),
        checks.counts,
    ),
    *(
        Claim(
            f"iterations-{panel.lower()}",
            IMAGES,
            f"ANODE needs fewer iterations, {panel}",
            f"With 10 augmented channels the same loss takes about {factor} times fewer iterations "
            "(section 5.2, figure 13).",
            f"At least {number(factor / 2)} times fewer, to the lowest loss of p = 0. Mean loss "
            f"curves, running median of {SMOOTH} points.",
            ("13",),
            partial(checks.faster_on_images, panel=panel, factor=factor),
            (panel,),
        )
        for panel, factor in ((MNIST, 10), (CIFAR10, 5))
    ),
    *(
        Claim(
            f"nfe-at-loss-{panel.lower()}",
            IMAGES,
            f"Half the NFE at equal loss, {panel}",
            words,
            "At the lowest loss that both reach, p = 0 has at least 1.5 times the NFE of p = 10. "
            f"Mean curves, running median of {SMOOTH} points.",
            ("13",),
            partial(checks.nfe_at_equal_loss, panel=panel),
            (panel,),
        )
        for panel, words in (
            (MNIST, "On MNIST as on CIFAR10, half the NFE serves for equal losses (figure 13)."),
            (CIFAR10, "For a loss of 0.8 the NODE takes about 100 NFE, ANODEs 50 (figure 13)."),
        )
    ),
    *(
        Claim(
            f"equal-parameters-{panel.lower()}",
            IMAGES,
            f"ANODE uses parameters better, {panel}",
            "With as many parameters, the ANODE has lower losses and fewer NFE than the NODE "
            "(figure 14).",
            "Mean final loss and mean NFE at the end are both below the NODE's.",
            ("14",),
            partial(checks.equal_parameters, panel=panel),
            (panel,),
        )
        for panel in (MNIST, CIFAR10)
    ),
    Claim(
        "decay-nfe",
        IMAGES,
        "Weight decay and augmentation: lowest NFE",
        "Weight decay together with augmentation has the lowest NFE (figure 15).",
        "Mean NFE at the end of ANODE with weight decay is the lowest of the four.",
        ("15",),
        checks.lowest_nfe,
    ),
    Claim(
        "decay-loss",
        IMAGES,
        "Weight decay and augmentation: slightly higher loss",
        "That comes at the cost of a slightly higher loss (figure 15).",
        "Mean final loss of ANODE with weight decay 1 to 2 times that of ANODE alone.",
        ("15",),
        checks.price_of_decay,
    ),
    Claim(
        "decay-node",
        IMAGES,
        "ANODE beats NODE with weight decay",
        "ANODEs outperform NODEs even when these use weight decay (figure 15).",
        "Mean final loss and mean NFE at the end of ANODE alone are both below those of NODE with "
        "weight decay.",
        ("15",),
        checks.beats_decay,
    ),
    Claim(
        "validation-cifar10",
        IMAGES,
        "ANODE generalises better on images",
        "Both overfit CIFAR10, but the ANODE has the lower validation loss: 1.18 against 1.34 "
        "(figure 16).",
        "The lowest point of the mean validation loss is lower for the ANODE.",
        ("16",),
        checks.validation,
    ),
    *(
        Claim(
            f"overfitting-{label.lower()}",
            IMAGES,
            title,
            words,
            f"{wanted}: a run failed, or ended with a loss over 10 times the lowest of the mean "
            f"curve, or the mean NFE of a point was {SEVERAL_HUNDRED} or more.",
            ("17",),
            partial(checks.stability, label=label),
        )
        for label, title, wanted, words in (
            (
                NODE,
                "NODE is unstable when overfitting",
                "At least one sign of instability",
                "NODEs that overfit MNIST become unstable: solves fail by underflow or by the cap "
                "of 1000 NFE, losses explode, flows need several hundred NFE (figure 17).",
            ),
            (
                ANODE,
                "ANODE is stable when overfitting",
                "No sign of instability",
                "ANODEs train stably to low losses with low NFE, even when they overfit "
                "(figure 17).",
            ),
        )
    ),
    Claim(
        "nfe-parity",
        SOLVER,
        "NFE equals torchdiffeq's",
        "Not in the paper, which used torchdiffeq: its NFE can only be compared with ours if both "
        "solvers take the same steps.",
        "At the trained weights, batch by batch, the NFE of at most 1 in 200 batches differs: the "
        "error ratio of a step can be within float32 rounding of 1.",
        tuple(FIGURES),
        checks.parity,
    ),
    Claim(
        "same-losses",
        SOLVER,
        "Losses equal torchdiffeq's",
        "Not in the paper: from the same weights on the same batches, both solvers train alike.",
        "The first points of the mean loss curves differ by less than 2 %, for every model.",
        ("speed",),
        checks.same_start,
    ),
    Claim(
        "faster",
        SOLVER,
        "Training is faster than with torchdiffeq",
        "Not in the paper: anode_fast's reason to be.",
        "torchdiffeq's median time of an iteration over ours is above 1 for every model; the "
        "trainings take turns in one process. NFE: forward, mean of both trainings.",
        ("speed",),
        checks.faster_solver,
    ),
)
