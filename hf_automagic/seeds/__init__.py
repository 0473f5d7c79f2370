"""The names of the two documents that this project grew from: classes, options and helpers, as aliases of ours."""
