"""Ray: actors that fit many people at once; the driver alone writes results to the tracker."""
