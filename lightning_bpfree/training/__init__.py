"""The Lightning side of training rules: the base class, its parts, and callbacks that work with every rule."""
