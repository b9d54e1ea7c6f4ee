"""Progress of `ramrec train` on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from model.training.optimisation import Epoch


class TrainingDisplay:
    """Progress bars of the two stages with loss and validation NDCG@10; at the end, the best epoch of each stage."""

    def __init__(self) -> None:
        self._console = Console()
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._best: dict[str, Epoch] = {}

    def __enter__(self) -> TrainingDisplay:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()
        for stage, epoch in self._best.items():
            figures = "  ".join(f"{name} {value:.4f}" for name, value in epoch.validation.items())
            text = epoch.note or f"{stage}: best epoch {epoch.epoch}, validation {figures}"
            self._console.print(text, highlight=False)

    def __call__(self, epoch: Epoch) -> None:
        """Show the result of an epoch."""
        if epoch.best:
            self._best[epoch.stage] = epoch
        if epoch.note:
            return
        if epoch.stage not in self._tasks:
            self._tasks[epoch.stage] = self._bars.add_task(epoch.stage, total=epoch.of, figures="")
        figures = self._figures(epoch)
        self._bars.update(self._tasks[epoch.stage], completed=epoch.epoch, figures=figures)
        if not self._console.is_terminal:
            self._console.print(f"{epoch.stage} {epoch.epoch}/{epoch.of}  {figures}", highlight=False)

    def _figures(self, epoch: Epoch) -> str:
        figures = f"loss {epoch.loss:.3f}  NDCG@10 {epoch.validation['ndcg@10']:.4f}"
        best = self._best.get(epoch.stage)
        return figures + (f"  best {best.validation['ndcg@10']:.4f} (epoch {best.epoch})" if best else "")
