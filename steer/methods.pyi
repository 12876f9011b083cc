# The module moved; it can be imported still: see `moved` in steer/__init__.py.
from steer.path import *
from steer.sampling.forecast import *
from steer.sampling.methods import *
