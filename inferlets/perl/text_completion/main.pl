#!/usr/bin/perl
# text_completion -- goes on from a prompt, with no library: all of it follows from docs/abi.md.
use strict;
use warnings;
use Encode qw(decode FB_DEFAULT STOP_AT_PARTIAL);
use List::Util qw(min);
use constant { SEND => 1, CREATE_QUEUE => 3, ALLOC_KVPAGE => 8, ALLOC_EMB => 13 };
use constant { EMBED_TXT => 16, FORWARD => 17, SAMPLE => 19, TOKENIZE => 20 };
$SIG{__DIE__} = sub { $! = 1 };    # the exit code

# --- msgpack, as much of it as the ABI needs ----------------------------------------------------

# A plain scalar is an integer, \1 and \0 are booleans; text stays octets throughout.
sub str { return bless \(my $octets = shift), 'Str' }
sub bin { return bless \(my $octets = shift), 'Bin' }

sub encode {
    my ($value) = @_;
    my $kind = ref $value;
    return "\xc0"                        if !defined $value;
    return pack 'C N/a*', 0xdb, $$value  if $kind eq 'Str';
    return pack 'C N/a*', 0xc6, $$value  if $kind eq 'Bin';
    return $$value ? "\xc3" : "\xc2"     if $kind eq 'SCALAR';
    return join '', pack('C N', 0xdd, scalar @$value), map { encode($_) } @$value if $kind;
    return $value < 0 ? pack('C l>', 0xd2, $value) : pack('C N', 0xce, $value);
}

sub value {    # one value off the front of what $rest refers to
    my ($rest) = @_;
    my $octets = sub { substr $$rest, 0, $_[0], '' };
    my $uint   = sub { unpack 'Q>', "\0" x (8 - $_[0]) . $octets->($_[0]) };
    my $array  = sub { [map { value($rest) } 1 .. $_[0]] };
    my $map    = sub { +{map { value($rest) } 1 .. 2 * $_[0]} };
    my $tag    = $uint->(1);
    return $tag                                  if $tag < 0x80;
    return $map->($tag - 0x80)                   if $tag < 0x90;
    return $array->($tag - 0x90)                 if $tag < 0xa0;
    return $octets->($tag - 0xa0)                if $tag < 0xc0;
    return $tag == 0xc0 ? undef : $tag == 0xc3   if $tag <= 0xc3;
    return $octets->($uint->(1 << $tag - 0xc4))  if $tag <= 0xc6;
    return unpack 'f>', $octets->(4)             if $tag == 0xca;
    return unpack 'd>', $octets->(8)             if $tag == 0xcb;
    return $uint->(1 << $tag - 0xcc)             if $tag <= 0xcf;
    return unpack +(qw(c s> l> q>))[$tag - 0xd0], $octets->(1 << $tag - 0xd0) if $tag <= 0xd3;
    return $octets->($uint->(1 << $tag - 0xd9))  if $tag <= 0xdb;
    return $array->($uint->(2 << $tag - 0xdc))   if $tag <= 0xdd;
    return $tag <= 0xdf ? $map->($uint->(2 << $tag - 0xde)) : $tag - 0x100;
}

# --- the connection: commands out, answers in, as frames ----------------------------------------

open my $in,  '<&=', 3 or die "fd 3: $!\n";
open my $out, '>&=', 3 or die "fd 3: $!\n";
$out->autoflush;
my (@outbox, @answers);

# All that is asked is on one queue, or is waited for at once: answers come in that order.
sub tell_it { push @outbox, [$_[0], undef, @_[1 .. $#_]] }    # no answer wanted
sub ask     { push @outbox, [$_[0], 0, @_[1 .. $#_]] }

sub flush {
    return if !@outbox;
    my $body = encode([splice @outbox]);
    my $size = length $body;
    print {$out} $size < 256 ? pack('C C', 0, $size) : pack('C Q>', 2, $size), $body
        or die "the connection is gone: $!\n";
}

sub octets { read($in, my $data, $_[0]) == $_[0] or die "the connection is gone\n"; $data }

sub answer {    # to the oldest question; sends what waits if it has to wait itself
    if (!@answers) {
        flush();
        my $body = octets(octets(1) eq "\x02" ? unpack 'Q>', octets(8) : ord octets(1));
        @answers = @{value(\$body)};
    }
    my ($failed, undef, $value, $message, $hint) = @{shift @answers};
    die "error: $message\n  try: $hint\n" if $failed;
    return $value;
}

# --- what is there at the start: arguments, model, vocabulary -----------------------------------

sub contents {    # of a descriptor
    open my $file, '<&=', $_[0] or die "fd $_[0]: $!\n";
    sysread $file, my $data, -s $file;
    return $data;
}

my $startup = value(\contents(6));
my ($model, $limits, @args) = ($startup->{models}[0], $startup->{limits}, @{$startup->{args}});
my %option = ('--prompt' => '', '--max-tokens' => 64, @args % 2 ? () : @args);
die "usage: text_completion --prompt TEXT --max-tokens N\n" if @args % 2 || keys %option != 2;

my $table = contents(7);
my $count = unpack 'x8 V', $table;
my $flags = 12 + 4 * ($count + 1);    # where they begin

sub text_of {
    my ($start, $end) = unpack 'VV', substr $table, 12 + 4 * $_[0], 8;
    return '' if ord(substr $table, $flags + $_[0], 1) & 1;    # a control token
    return substr $table, $flags + $count + $start, $end - $start;
}

# --- the program --------------------------------------------------------------------------------

use constant { QUEUE => 1, KV => 1, EMB => 1, TOKEN => 1 };    # handles are ours to choose
use constant AHEAD => 32;    # steps queued before their tokens are known

ask(TOKENIZE, 0, str($option{'--prompt'}));
my @prompt = @{answer()};
my $asked  = $option{'--max-tokens'} =~ /^(\d+)$/ ? $1 : 0;
my $most   = min($asked, $model->{max_context} - @prompt);
die "the prompt is empty or too long, or --max-tokens is no number\n" if !@prompt || $most < 1;
my $chunk = min($limits->{embeds}, 512);
tell_it(CREATE_QUEUE, QUEUE);
tell_it(ALLOC_KVPAGE, QUEUE, KV, 1 + int((@prompt + $most - 1) / $model->{page_size}));
tell_it(ALLOC_EMB, QUEUE, EMB, $chunk);

my ($length, $sampled) = (0, 0);    # tokens in the cache, or soon; steps queued
sub forward {    # of tokens; late-bound ones are negative
    my ($n, $reads) = (scalar @_, $length ? [[KV, 0, $length]] : []);
    tell_it(EMBED_TXT, QUEUE, [EMB, 0], [@_], $length);
    tell_it(FORWARD, QUEUE, [EMB, 0, $n], $reads, [KV, $length, $n], [EMB, $n - 1, 1]);
    $length += $n;
    return $n - 1;    # where the hidden state of the last is: in its embed's place
}

sub sample {    # greedy; the first and the last answer come at once
    my $lazy = ++$sampled > 1 && $sampled < $most ? 1 : 0;
    ask(SAMPLE, QUEUE, [EMB, $_[0]], TOKEN, 0, 0, 1, 0, undef, $model->{eos_tokens}, \$lazy);
}

forward(splice @prompt, 0, $chunk) while @prompt > $chunk;
sample(forward(@prompt));
my $octets = '';    # those not sent yet: a token may end within a character
for (my $taken = 0; $taken < $sampled; $taken++) {
    if ($sampled - $taken <= AHEAD / 2) {
        sample(forward(-1 - TOKEN)) while $sampled - $taken < AHEAD && $sampled < $most;
    }
    my $token = answer();    # nil behind a token that stopped the chain
    last if !defined $token || grep { $_ == $token } @{$model->{eos_tokens}};
    $octets .= text_of($token);
    my $text = decode('UTF-8', $octets, FB_DEFAULT | STOP_AT_PARTIAL);
    utf8::encode($text);
    tell_it(SEND, bin($text)) if length $text;
}
tell_it(SEND, bin("\xef\xbf\xbd")) if length $octets;
flush();
