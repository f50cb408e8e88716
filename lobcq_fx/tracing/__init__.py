"""Capture a model as one flat FX graph, and how a call of the model becomes a call of that graph."""
