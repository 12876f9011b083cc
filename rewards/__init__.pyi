# What `import rewards` offers, and where it lives: read by rewards/__init__.py when it is used.
from .catalogue import (
    FUNCTIONS as FUNCTIONS,
)
from .catalogue import (
    NAMES as NAMES,
)
from .loading import (
    Reward as Reward,
)
from .loading import (
    load as load,
)
from .loading import (
    wrap as wrap,
)
