"""``dense_match``: matches the pixels of one image to all pixels of another, from coarse descriptor maps.

Bilinear interpolation commutes with the dot product. The similarities of one query descriptor to all key pixels are
the bilinear enlargement of its similarities to the coarse key cells, so pixel descriptors are never formed. A bilinear
patch never exceeds its four corners, so only patches with a corner above the best value can hold the match. The native
core and the GPU kernels also interpolate on the query's side, bound all query pixels between four cells at once, and
evaluate only a patch's four outermost pixels, one of which is its largest.

:mod:`.bilinear` holds the geometry, :mod:`.plain` the specification and fallback, :mod:`.cpu` and :mod:`.gpu` (on
:mod:`.cuda` or Triton) the fast searches, and :mod:`.op` the operator, which selects one.
"""
