from dylora_mlx.api import Generated as Generated
from dylora_mlx.api import RoutedText as RoutedText
from dylora_mlx.api import Run as Run
from dylora_mlx.api import learn as learn
from dylora_mlx.api import load as load
from dylora_mlx.config import Config as Config
from dylora_mlx.config import Source as Source
from dylora_mlx.errors import UserError as UserError

__version__: str
