"""The page of timm_arl as a Space. The folder of the package lies beside this file."""
import sys

from timm_arl.extras import require

require('app', __name__)

from timm_arl.app.__main__ import main

sys.exit(main(['--host', '0.0.0.0', '--port', '7860', *sys.argv[1:]]))
