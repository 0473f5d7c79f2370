"""The optimizer: buckets, groups, guard, context, and the class around them."""
