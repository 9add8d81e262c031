import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmark"))  # tests import exact, the evaluation by enumeration

torch.set_num_threads(1)  # the tensors are tiny: a second thread only costs
