"""The columns of the tables that tell the kernels where everything lies; numbers that host and kernels share."""

import triton.language as tl

# int64, one line for each tensor. Addresses are bytes, 0 is none; a vector's below zero is -1 - its place in `work`.
PARAM = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)  # codes, or float32
SCALE = tl.constexpr(2)
ZERO = tl.constexpr(3)
MASK = tl.constexpr(4)  # lr_mask
VECTORS = tl.constexpr(5)  # row and column averages of the square, row and column averages of the residual
CODES = tl.constexpr(9)  # of the same four in 16 bits
CODE_SCALES = tl.constexpr(13)
STEP = tl.constexpr(17)
ROWS = tl.constexpr(18)
COLS = tl.constexpr(19)
BLOCKS = tl.constexpr(20)  # of a row
BLOCK = tl.constexpr(21)  # elements that share a scale
COL_TILES = tl.constexpr(22)
ROW_TILES = tl.constexpr(23)
TILE_ROWS = tl.constexpr(24)
ROW_PARTS = tl.constexpr(25)  # place of the partial sums of rows [col_tiles, rows] in a plane of `parts`
COL_PARTS = tl.constexpr(26)  # [row_tiles, cols]
FIRST_TILE = tl.constexpr(27)
FIRST_SLICE = tl.constexpr(28)
ROW_SLICES = tl.constexpr(29)
COL_SLICES = tl.constexpr(30)
GROUP = tl.constexpr(31)
KEY = tl.constexpr(32)  # stable number of the parameter
SEED = tl.constexpr(33)
MOMENT = tl.constexpr(34)  # a full second moment
WIDTH = tl.constexpr(35)

# float32, one line for each param group
LR = tl.constexpr(0)
INITIAL_LR = tl.constexpr(1)
SCHEDULE = tl.constexpr(2)
MIN_LR = tl.constexpr(3)
MAX_LR = tl.constexpr(4)
WARMUP = tl.constexpr(5)
IS_TUNED = tl.constexpr(6)  # the rate is not the user's
IN_CONTEXT = tl.constexpr(7)
SPEED = tl.constexpr(8)
DRIFT = tl.constexpr(9)
LOWEST = tl.constexpr(10)
HIGHEST = tl.constexpr(11)
VOTE_SCALE = tl.constexpr(12)
HAS_POOL = tl.constexpr(13)  # its log rate moves
SEARCHES = tl.constexpr(14)
RAIL_STEPS = tl.constexpr(15)
NUMEL = tl.constexpr(16)  # elements with a gradient
BETA1 = tl.constexpr(17)
WEIGHT1 = tl.constexpr(18)  # 1 - beta1
WEIGHT2 = tl.constexpr(19)
WEIGHT3 = tl.constexpr(20)
LOG1 = tl.constexpr(21)  # log(beta1)
LOG2 = tl.constexpr(22)
LOG3 = tl.constexpr(23)
CLIP = tl.constexpr(24)
EPS = tl.constexpr(25)
DECAY = tl.constexpr(26)
CLEAR = tl.constexpr(27)  # a momentum above it votes
LIMIT = tl.constexpr(28)  # of the element mask
RECENTRE = tl.constexpr(29)
GROUP_WIDTH = tl.constexpr(30)

# float32, one line for each param group: what the step decides
LOG_RATE = tl.constexpr(0)
BASE_LR = tl.constexpr(1)
APPLIED_LR = tl.constexpr(2)
UPDATE_RMS = tl.constexpr(3)
RATES_WIDTH = tl.constexpr(4)

# int64: the control block
OFFENDER = tl.constexpr(0)  # of the look under way, NOBODY without one
APPLIED = tl.constexpr(1)
SKIPPED = tl.constexpr(2)
CONSECUTIVE = tl.constexpr(3)
LAST_OFFENDER = tl.constexpr(4)
RECORDED = tl.constexpr(5)
FOUND = tl.constexpr(6)  # the offender that `decide` has read, so that the next look starts anew
NOBODY = tl.constexpr(2**62)

# float32, one line for each tensor: what a step measured
CLIPPED = tl.constexpr(0)  # 1 / the factor that the update was divided by
AGREEMENT = tl.constexpr(1)
UPDATE = tl.constexpr(2)
SQUARE = tl.constexpr(3)  # of the momentum
STATS_WIDTH = tl.constexpr(4)

# planes of `sums`, float32, one number for each tile
SUM_GRAD = tl.constexpr(0)
SUM_UPDATE = tl.constexpr(1)
SUM_AGREEMENT = tl.constexpr(2)
SUM_MOMENTUM = tl.constexpr(3)
SUM_OFFSETS = tl.constexpr(4)
SUM_AGREEING = tl.constexpr(5)
SUM_VOTING = tl.constexpr(6)
SUM_CHANGE = tl.constexpr(7)  # squared changes of the weights
SUM_PLANES = tl.constexpr(8)

# planes of the sums of the residuals' slices, float32, one number for each slice
SLICE_MOMENTUM = tl.constexpr(1)  # squared
SLICE_WEIGHTED = tl.constexpr(2)  # the same over the averages
SLICE_PLANES = tl.constexpr(3)

# float32, one line for each param group: sums of what is not stepped by the kernels
CHANGE = tl.constexpr(3)  # after those of the agreement
POOL_WIDTH = tl.constexpr(4)
