"""What everything stands on: errors, schemas, files, locks and declarations."""
