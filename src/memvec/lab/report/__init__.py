"""From a store to something to look at: tables, figures with their data, one page."""
