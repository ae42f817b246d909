# The same as call.c: call.pl NUMBER ARGUMENT...
use strict;
use warnings;

my ($number, @arguments) = map { /^s:(.*)/s ? $1 : 0 + $_ } @ARGV;
$! = 0;
my $result = syscall $number, @arguments;
print $result == -1 && $! ? -$! : $result, "\n";
