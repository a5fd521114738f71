"""FairDiff: fine-tune text-to-image models towards a distribution of your choice, and audit them with intervals."""
