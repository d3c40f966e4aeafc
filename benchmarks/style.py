"""Colours and style that the plots share."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, told apart with every kind of colour vision.
INNER, OUTER = "#0072B2", "#E69F00"
MODEL_COLORS = {"NODE": "#CC3377", "ANODE": "#009E73", "ResNet": "#0072B2"}
SOLVER_STYLES: dict[str, dict[str, Any]] = {
    "torchdiffeq": {"linewidth": 5, "alpha": 0.3, "solid_capstyle": "butt"},
    "anode_fast": {"linewidth": 1.3},
}
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 180,
}
