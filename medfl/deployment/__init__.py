"""How medfl runs where the data are: processes of the coordinator and of a site, and the offline bundle."""
