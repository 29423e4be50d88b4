__version__ = "0.1.0"

# nbdev keeps the rest of this file, which belongs to no notebook: no package may be imported before this line.
from .core.telemetry import disable_telemetry as _disable_telemetry

_disable_telemetry()


def __getattr__(name: str) -> object:
    "Load `cvnb.Bundle` when it is asked for: commands that need none start without ONNX Runtime's reader."
    if name != "Bundle": raise AttributeError(f"module 'cvnb' has no attribute '{name}'")
    from .export.bundle import Bundle
    return Bundle
