"""A plot of an evaluation, by matplotlib if it is installed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from npqwen.atomic_file import new_file
from npqwen.errors import OptionError
from npqwen.reports.evaluation_report import Evaluation
from npqwen.reports.machine_report import check_path


def check_plot(path: Path) -> Path:
    """`path` with ~ expanded. Raises OptionError or OutputError, before anything is measured, if no plot can be drawn
    there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("a plot needs matplotlib; install it: python -m pip install matplotlib") from None
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise OptionError(f"{path} does not have the suffix of a plot: {', '.join(f'.{kind}' for kind in kinds)}")
    return check_path(path)


def draw(evaluation: Evaluation, path: Path) -> None:
    """Draw the distribution of the tokens' values, and the cost of each part if it was measured.

    Raises OutputError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    costs = evaluation.layers
    figure = Figure(figsize=(8, 4 if costs is None else 9), layout="constrained")
    axes = figure.subplots(1 if costs is None else 2, squeeze=False)[:, 0]
    kl = evaluation.values.kl
    values = np.sort(evaluation.values.nll if kl is None else kl)[::-1]
    share = np.arange(1, values.size + 1) / values.size
    axes[0].plot(np.maximum(values, 1e-12), share)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("share of tokens with at least this")
    name = os.path.basename(evaluation.model.rstrip("/\\"))
    if kl is None:
        axes[0].set_xlabel("-log p of the token, in nats")
    else:
        axes[0].set_xscale("log")
        axes[0].set_xlabel("KL divergence, in nats")
    axes[0].set_title(f"{name} ({evaluation.encoding}), {values.size} tokens")
    if costs is not None:
        names = [part.part for part in costs.parts][::-1]
        axes[1].barh(names, [part.kl.mean for part in costs.parts][::-1])
        axes[1].tick_params(axis="y", labelsize=7)
        axes[1].set_xlabel("KL divergence with only this part replaced, in nats")
    with new_file(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
