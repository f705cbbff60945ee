"""`python -m medrlvr_jax …`: the same as `medrlvr …`."""

import sys

from medrlvr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
