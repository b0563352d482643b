"""``nearest``: ``op`` registers the operator and decides, ``plain``, ``cpu`` and ``gpu`` search."""
