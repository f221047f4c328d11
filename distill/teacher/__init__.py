"""What distillation asks of a teacher (signals), answered by the live model or by files written beforehand."""
