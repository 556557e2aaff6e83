"""`python -m editrl`, `torchrun -m editrl grpo ...`, `accelerate launch -m editrl grpo ...`."""

import sys

from editrl.cli import main

sys.exit(main())
