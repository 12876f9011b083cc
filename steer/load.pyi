# The module moved; it can be imported still: see `moved` in steer/__init__.py.
from steer.models.loading import *
