"""What the programs in benchmarks/ share."""
from ..extras import require

require('train', __name__)
