"""The tasks by name: `[task] kind`. The loop knows nothing of a task but the methods of `Task`."""

from cloche.tasks.classify import ClassifyConfig
from cloche.tasks.diffusion import DiffusionConfig
from cloche.tasks.forecast import ForecastConfig
from cloche.tasks.language import LanguageConfig
from cloche.tasks.regress import RegressConfig
from cloche.tasks.task import Task
from cloche.tasks.transcribe import TranscribeConfig
from cloche.tasks.translate import TranslateConfig

__all__ = ["TASKS", "Task"]

TASKS = {
    "classify": ClassifyConfig,
    "regress": RegressConfig,
    "forecast": ForecastConfig,
    "transcribe": TranscribeConfig,
    "language": LanguageConfig,
    "translate": TranslateConfig,
    "diffusion": DiffusionConfig,
}
