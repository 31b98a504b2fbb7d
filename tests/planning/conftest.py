from .clocked import clock

__all__ = ["clock"]
