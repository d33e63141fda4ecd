"""python -m kdkernels.cli"""

import sys

from kdkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
