"""Which loss and which crops are best at equal budget: studies, their runs, statistics and the page of results."""
