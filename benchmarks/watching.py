"""What watching a run costs: records, sample grids and the live figure, as shares of the time of `smoke`'s 2,400 steps.

    python benchmarks/watching.py

Each part is timed five times between steps, in turns, and taken as often as a run does it; the median of each.
"""

import io
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v


def main():
    run, figure = v.Training(v.PROFILES["smoke"]), plt.figure()
    file = Path(tempfile.mkdtemp(), "samples.png")

    def draw():
        v.draw_progress(figure, run)
        figure.savefig(io.BytesIO(), bbox_inches="tight")

    parts = {
        "step": run.train_step,
        "record": run.record,
        "grid": lambda: v.save_picture(run.samples(), file),
        "figure": draw,
    }
    seconds = {name: [] for name in parts}
    for _ in range(6):
        for name, part in parts.items():
            start = time.process_time()
            part()
            seconds[name].append(time.process_time() - start)
    cost = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up
    steps = run.config.steps
    whole = steps * cost["step"]
    grids = 1 + sum(int(4 * math.log2(n)) > int(4 * math.log2(n - 1)) for n in range(16, steps + 1))
    times = {
        "record": steps // v.RECORD_EVERY,
        "grid": grids,
        "figure": whole // max(v.DRAW_SECONDS, 150 * cost["figure"]),
    }
    for name, often in times.items():
        print(f"{name:8s} {cost[name]:6.3f} s, {often:3.0f} times: {often * cost[name] / whole:.2%}")
    print(f"{'step':8s} {cost['step']:6.3f} s; all {sum(times[name] * cost[name] for name in times) / whole:.2%}")


if __name__ == "__main__":
    main()
