"""What people see of an optimizer: snapshots, statistics files, plots and the model card's section."""
