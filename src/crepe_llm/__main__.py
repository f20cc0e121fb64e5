"""`python -m crepe_llm`: the `crepe` command."""

import sys

from crepe_llm.cli.main import main

sys.exit(main())
