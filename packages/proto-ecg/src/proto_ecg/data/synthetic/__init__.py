"""Built-in 12-lead ECGs: a rotating heart dipole, seen through a lead field, with findings that follow from its parts.

McSharry et al. 2003 (IEEE Trans. Biomed. Eng. 50:289) write one lead as Gaussian events on the phase of a limit cycle;
Sameni et al. 2007 (EURASIP J. Adv. Signal Process. 2007:43407) do so for the three axes of a dipole and project that to
the leads. Here the equation is not solved step by step: see :mod:`proto_ecg.data.synthetic.model`.
"""

from proto_ecg.data.synthetic.findings import DEFAULT_LABELS, SUPPORTED_LABELS
from proto_ecg.data.synthetic.layout import write_ptbxl
from proto_ecg.data.synthetic.model import SyntheticECG, generate_ecgs

__all__ = ["DEFAULT_LABELS", "SUPPORTED_LABELS", "SyntheticECG", "generate_ecgs", "write_ptbxl"]
