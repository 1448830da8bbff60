"""How ranks divide the work: the mesh, who holds which tokens, and the collectives that gradients pass through."""

from lr2train.parallel.layout import Layout
from lr2train.parallel.mesh import Mesh, make_mesh

__all__ = ["Layout", "Mesh", "make_mesh"]
