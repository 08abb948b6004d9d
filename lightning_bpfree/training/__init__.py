"""The Lightning side of a training rule: the base class, what it is made of, and what works with every rule."""
