"""Networks in plain torch: the frozen classifier and prior, and the control that is trained."""
