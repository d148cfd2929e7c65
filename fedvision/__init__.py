"""fedvision: federated learning for medical imaging that hospitals can trust."""

__version__ = "0.1.0"
