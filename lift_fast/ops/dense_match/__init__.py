"""``dense_match``: matches the pixels of one image to all pixels of another, from coarse descriptor maps.

Bilinear interpolation commutes with the dot product: the similarities of one query descriptor to all key pixels are
the bilinear enlargement of its similarities to the coarse key cells, so pixel descriptors are never formed. And a
bilinear patch never exceeds its four corners, so only patches with a corner above the best value can hold the match.
The native core goes further on the CPU: it interpolates on the query's side too, bounds all query pixels between four
cells at once, and looks only at a patch's four outermost pixels, one of which is its largest. The kernels on the GPU
do the same.

:mod:`.bilinear` is the geometry of it, :mod:`.plain` the specification and fallback, :mod:`.cpu` and :mod:`.gpu` (on
:mod:`.cuda` or Triton) the fast searches, :mod:`.op` the operator, which chooses among them.
"""
