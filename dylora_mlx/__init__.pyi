from dylora_mlx.api import Generated as Generated
from dylora_mlx.api import RoutedText as RoutedText
from dylora_mlx.api import Run as Run
from dylora_mlx.api import learn as learn
from dylora_mlx.api import load as load
from dylora_mlx.config import Config as Config
from dylora_mlx.config import Source as Source
from dylora_mlx.errors import Failure as Failure
from dylora_mlx.errors import UserError as UserError
from dylora_mlx.training.callbacks import Callback as Callback
from dylora_mlx.training.callbacks import DecisionEvent as DecisionEvent
from dylora_mlx.training.callbacks import EvaluationEvent as EvaluationEvent
from dylora_mlx.training.callbacks import SkillEvent as SkillEvent
from dylora_mlx.training.callbacks import StepEvent as StepEvent

__version__: str
