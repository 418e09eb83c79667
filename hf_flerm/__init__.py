"""Function-space learning rates for Transformers and PEFT: record them on a small run, match them on a big one.

The definition of a rate is in `rates/reference.py`: read it first. `rates/probe.py` measures rates on a model;
`training/run.py` follows an optimizer step from start to end.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
