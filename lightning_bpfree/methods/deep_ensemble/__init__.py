"""Deep ensembles: many members of one LightningModule, trained in one run."""
