# The module moved; it can be imported still: see `moved` in steer/__init__.py.
from steer.adapters.fingerprint import *
from steer.adapters.inject import *
from steer.adapters.lora import *
from steer.adapters.merge import *
from steer.adapters.store import *
