"""DyLoRA-MoE on MLX: a frozen base, a growing pool of LoRA experts, and a router that does not forget.

    import dylora_mlx

    run = dylora_mlx.load("runs/quickstart")          # open a finished run
    run.route("import flask")                         # the expert of each token
    run.generate("import flask", max_tokens=40)       # text
    run = run.add_skill("notes.jsonl", name="notes")  # learn one more skill
    run = dylora_mlx.learn("my.yaml")                 # start a new run; callbacks=[...] are called as it goes on

Public names are imported on first use, so that importing the package is fast. On Linux, the import also loads a fast BLAS,
which must happen before MLX is imported (see `dylora_mlx.system.blas`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dylora_mlx.system import blas

if TYPE_CHECKING:
    from dylora_mlx.api import Generated, RoutedText, Run, learn, load
    from dylora_mlx.config import Config, Source
    from dylora_mlx.errors import Failure, UserError
    from dylora_mlx.training.callbacks import Callback, DecisionEvent, EvaluationEvent, SkillEvent, StepEvent

__version__ = "0.1.0"

_HOMES = {
    "Callback": "dylora_mlx.training.callbacks",
    "Config": "dylora_mlx.config",
    "DecisionEvent": "dylora_mlx.training.callbacks",
    "EvaluationEvent": "dylora_mlx.training.callbacks",
    "Failure": "dylora_mlx.errors",
    "Generated": "dylora_mlx.api",
    "RoutedText": "dylora_mlx.api",
    "Run": "dylora_mlx.api",
    "SkillEvent": "dylora_mlx.training.callbacks",
    "Source": "dylora_mlx.config",
    "StepEvent": "dylora_mlx.training.callbacks",
    "UserError": "dylora_mlx.errors",
    "learn": "dylora_mlx.api",
    "load": "dylora_mlx.api",
}
__all__ = [
    "Callback", "Config", "DecisionEvent", "EvaluationEvent", "Failure", "Generated", "RoutedText", "Run", "SkillEvent", "Source",
    "StepEvent", "UserError", "__version__", "learn", "load",
]  # fmt: skip

# Before any import of MLX: the dynamic linker binds MLX to the BLAS that is loaded first.
blas.preload()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dylora_mlx' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
