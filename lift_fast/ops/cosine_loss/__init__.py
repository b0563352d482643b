"""``cosine_loss``: ``op`` registers the operator and its gradient; ``plain``, ``cpu`` and ``gpu`` compute both."""
