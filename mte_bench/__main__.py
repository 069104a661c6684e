"""``python -m mte_bench``, which launchers such as torchrun need."""

import sys

from mte_bench.cli import main

sys.exit(main())
