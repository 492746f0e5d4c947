"""Whether a step can be trusted, and where it went wrong if not."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from training.diagnose import first_not_finite, largest_loss_and_gradient
from training.errors import DivergenceError, common
from training.mesh import Mesh
from training.step_result import Submitted

if TYPE_CHECKING:
    from training.model import GPT

_LOSSES = 20  # of the last steps, whose median a jump is told by


class Divergence:
    """Knows the last losses. All ranks of a worker call it together."""

    def __init__(self, model: GPT, mesh: Mesh, max_jump: float) -> None:
        """max_jump: nats above the median of the last losses; 0: any."""
        self._model, self._mesh, self._max_jump = model, mesh, max_jump
        self.recent_losses: deque[float] = deque(maxlen=_LOSSES)

    def require_sound(
        self, step: Submitted, again: Callable[[], object], gradients: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Raises DivergenceError on every rank for a loss or norm that is not finite, or a loss that jumped, and says
        where it came from. again: runs the step's forward and backward; gradients: those of the step, after that."""
        worker, loss, grad_norm = self._mesh.worker, step.loss, step.grad_norm
        enough = len(self.recent_losses) >= _LOSSES // 2
        usual = statistics.median(self.recent_losses) if enough else math.inf
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            where = first_not_finite(worker, self._model, again, self._mesh.pp_index)
            what = f"the loss is {loss}, the gradient norm {grad_norm}"
        elif self._max_jump > 0 and loss > usual + self._max_jump:
            losses = (step.shares.value()[:, 0] * worker.size).tolist()
            if self._mesh.device.late:  # what it has now are gradients of the next step
                again()
            where = largest_loss_and_gradient(worker, losses, gradients())
            what = f"the loss jumped from {usual:.4f} to {loss:.4f} (monitor.max_loss_jump allows {self._max_jump:g})"
        else:
            return
        if self._mesh.layout.workers > 1:
            where += f" of worker {self._mesh.worker_index}"
        raise common(
            DivergenceError(
                f"step {step.step}: {what}; {where}; resume from the last checkpoint with a lower optimizer.lr or "
                "longer warmup_steps"
            ),
            self._mesh.worker_index * self._mesh.layout.worker_ranks,
        )
