"""What watching a run costs: records, sample grids and the live figure, as shares of the time of `smoke`'s 2,400 steps.

    python benchmarks/watching.py

Each part is timed five times between steps, in turns, and counts as often as the notebook's `Keeper` does it; the median.
"""

import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vitgan_nb as v


def grids_of(run: v.Training, steps: int) -> int:
    """How many sample grids a run of so many steps leaves before its end."""
    keeper = v.Keeper(run, Path(), tensorboard=False)
    keeper.bar, keeper.write, keeper.by_time = mock.MagicMock(), mock.Mock(), False
    with mock.patch.object(v.Run, "samples"), mock.patch.object(keeper, "draw"):
        for run.step in range(steps + 1):
            keeper.after_step()
    run.step = 0
    return keeper.write.call_count


def main():
    run = v.Training(v.PROFILES["smoke"])
    steps, grids = run.config.steps, grids_of(run, run.config.steps)
    keeper, file = v.Keeper(run, Path(), tensorboard=False), Path(tempfile.mkdtemp(), "samples.png")
    keeper.figure = plt.figure()
    keeper.handle = SimpleNamespace(update=lambda figure: figure.savefig(io.BytesIO(), bbox_inches="tight"))
    parts = {"step": run.train_step, "record": run.record, "grid": lambda: v.save_picture(run.samples(), file)}
    parts["figure"] = keeper.draw
    seconds = {name: [] for name in parts}
    for _ in range(6):
        for name, part in parts.items():
            start = time.process_time()
            part()
            seconds[name].append(time.process_time() - start)
    cost = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up
    whole = steps * cost["step"]
    times = {"record": steps // v.RECORD_EVERY, "grid": grids, "figure": whole // keeper.pause}
    for name, often in times.items():
        print(f"{name:8s} {cost[name]:6.3f} s, {often:3.0f} times: {often * cost[name] / whole:.2%}")
    print(f"{'step':8s} {cost['step']:6.3f} s; all {sum(times[name] * cost[name] for name in times) / whole:.2%}")


if __name__ == "__main__":
    main()
