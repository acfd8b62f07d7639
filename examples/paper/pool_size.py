r"""How large a pool (paper, appendix A, figure 10), and what the cost rule says about it.

Claim: with the same threshold for all, a larger pool B in {384, 640, 1024} (b = 128) ends at a lower training loss,
since it allows a larger variance reduction; 2b < B < 6b is a good choice (the bounds recalled, not checked).

The paper says nothing of what a pool costs. The rule of this package does (docs/costs.md): a step that scores B and
keeps b, with replacement, costs (κB + b) / b uniform steps and has b/B + 1/τ² of their variance. It pays where the
product is below 1, and the ratio that makes that smallest is τ/√κ. It is drawn beside the training losses, for the κ
and τ of these runs::

    python examples/paper/pool_size.py                    # digits, b = 32, under 3 minutes
    python examples/paper/pool_size.py --full             # CIFAR-10, WRN-28-2, B of 384, 640, 1024 and 2048

Measured (10 CPU seconds a run, seeds 0 to 2): training loss 0.0022 uniform, 0.0038 to 0.0052 for B of 2b to 5b, 0.0075
for 8b, 0.018 for 16b; the rule has 0.99 to 1.13, 1.08 and 1.45 for these. Table: docs/paper.md.
"""

from __future__ import annotations

import statistics

import equal_time
import figures
import image_classification
import numpy as np
from systems import PAPER, SYSTEMS, System

RATIOS = {2.0: figures.SKY, 3.0: figures.BLUE, 5.0: figures.GREEN, 8.0: figures.ORANGE, 16.0: figures.RED}
NAMES = {f"ratio_{ratio:g}": ratio for ratio in RATIOS}
OURS = "Katharopoulos and Fleuret, 2018, appendix A"
SYSTEMS_BY_POOL = {"uniform": SYSTEMS["uniform"]} | {
    name: System(OURS, RATIOS[ratio], {**PAPER, "presample_ratio": ratio}) for name, ratio in NAMES.items()
}


def predicted(ratio: np.ndarray, kappa: float, tau: float) -> np.ndarray:
    """Give cost times variance of a step that scores ``ratio`` b and keeps b, relative to a uniform step."""
    return (1 + kappa * ratio) * (1 / ratio + 1 / tau**2)


def draw(rows: list[dict], made: str, file: equal_time.Path) -> None:
    """Draw training loss against time, and at the end of it against the pool, with the rule's prediction."""
    figure, (curves, ends, rule) = figures.new_figure(10.5, 3.9, 3)
    found = equal_time.finals(rows)
    for name, system in SYSTEMS_BY_POOL.items():
        runs: dict[int, list[dict]] = {}
        for row in rows:
            if row["system"] == name:
                runs.setdefault(row["seed"], []).append(row)
        if runs:
            label = f"B = {NAMES[name]:g} b" if name in NAMES else name
            equal_time.draw_mean(curves, list(runs.values()), "train_loss", system.color, system.line, label)
            losses = [row["train_loss"] for row in found if row["system"] == name]
            ends.plot([NAMES.get(name, 1.0)] * len(losses), losses, "o", color=system.color, ms=5)
    kappa, tau = measured(rows)
    ratio = np.geomspace(1.2, 20, 200)
    rule.plot(ratio, predicted(ratio, kappa, tau), color=figures.BLACK)
    for name, value in NAMES.items():
        rule.plot(value, predicted(np.array(value), kappa, tau), "o", color=SYSTEMS_BY_POOL[name].color)
    rule.axhline(1, color="0.5", lw=1, ls="--")
    curves.set(xlabel=equal_time.clock_name(), ylabel="training loss")
    curves.legend(frameon=False, fontsize=7.5, loc="upper center")
    ends.set(xscale="log", xlabel="pool, B / b (1: uniform)", ylabel="training loss at the end")
    for panel in (curves, ends):
        figures.log_scale(panel)
    rule.set(xscale="log", xlabel="pool, B / b", ylabel="cost x variance / uniform")
    curves.set_title("along the run: mean of the seeds, and their range", fontsize=9)
    ends.set_title("at its end: a dot a seed", fontsize=9)
    rule.set_title(f"the rule for κ {kappa:.2f}, τ {tau:.2f}: below 1 it pays", fontsize=9)
    for panel in (ends, rule):
        panel.set_xticks([1, 2, 3, 5, 8, 16], ["1", "2", "3", "5", "8", "16"], minor=False)
        panel.set_xticks([], minor=True)
    figures.save(figure, file, made, (row["seed"] for row in rows))


def measured(rows: list[dict]) -> tuple[float, float]:
    """Give the median κ of the runs that measured it, and the mean τ along the runs that were on."""
    kappas = [row["kappa"] for row in equal_time.finals(rows) if row["kappa"] == row["kappa"]]
    taus = [row["tau"] for row in rows if row["active_share"] > 0]
    return (statistics.median(kappas) if kappas else 1 / 3), (statistics.mean(taus) if taus else 1.0)


def main() -> None:
    """Run, write, draw."""
    given = equal_time.parser(__doc__, SYSTEMS_BY_POOL).parse_args()
    made = equal_time.prepare()
    chosen = {name: SYSTEMS_BY_POOL[name] for name in given.systems}
    experiment = equal_time.overrides(image_classification.experiment(given), given)
    rows = equal_time.run_all(experiment, chosen, given.seeds)
    kappa, tau = measured(rows)
    for row in rows:
        ratio = NAMES.get(row["system"])
        row["ratio"] = ratio or 1.0
        row["predicted"] = float(predicted(np.array(ratio), kappa, tau)) if ratio else 1.0
    figures.write(given.output / "pool_size.csv", rows, made)
    draw(rows, made, given.output / "pool_size.png")
    print(
        f"\n{made}\n\n{equal_time.table(rows)}\n\nκ {kappa:.3f}, mean τ while on {tau:.2f}: cost x variance predicted"
    )
    print({name: round(float(predicted(np.array(ratio), kappa, tau)), 3) for name, ratio in NAMES.items()})


if __name__ == "__main__":
    main()
